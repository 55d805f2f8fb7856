-- Return an entry for another attempt, at the end of the queue. ARGV: incarnation, group, entry, number of the attempt,
-- attempts that count afterwards, attempts allowed.
local group_id, entry_id, attempt, attempts = ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
-- A higher number means that another consumer has taken the group meanwhile.
if tonumber(redis.call('HGET', ATTEMPTS, group_id) or 0) ~= attempt then return 'lost' end
if attempts >= tonumber(ARGV[6]) then return 'exhausted' end
if not take_off(ROLLOUTS, SCORERS, entry_id) then return 'lost' end
redis.call('HSET', ATTEMPTS, group_id, attempts)
put_on(ROLLOUTS, group_id, redis.call('HGET', PAYLOADS, group_id), redis.call('HGET', BYTES, group_id))
return 'released'
