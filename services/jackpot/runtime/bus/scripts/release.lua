-- Give an entry back for another attempt, at the end of the queue. ARGV: incarnation, group, entry, attempts allowed,
-- 1 if the attempt never began and does not count.
local group_id, entry_id, allowed = ARGV[2], ARGV[3], tonumber(ARGV[4])
local attempts = tonumber(redis.call('HGET', ATTEMPTS, group_id) or 0) - tonumber(ARGV[5])
if attempts >= allowed then return 'exhausted' end
if not take_off(ROLLOUTS, SCORERS, entry_id) then return 'lost' end
redis.call('HSET', ATTEMPTS, group_id, math.max(attempts, 0))
put_on(ROLLOUTS, group_id, redis.call('HGET', PAYLOADS, group_id), redis.call('HGET', BYTES, group_id))
return 'released'
