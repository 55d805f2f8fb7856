-- Replace a group with its scored form. ARGV: incarnation, group, entry, payload name, size, payload (empty if elsewhere).
-- KEYS[13]: the group's payloads.
local group_id, entry_id, payload, size = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
if redis.call('HGET', PAYLOADS, group_id) == payload then return 'published' end -- sent again after a cut reply
if not take_off(ROLLOUTS, SCORERS, entry_id) then return 'lost' end
redis.call('HDEL', KEYS[13], redis.call('HGET', PAYLOADS, group_id))
put_on(SCORED, group_id, payload, size)
redis.call('HSET', OPEN, group_id, 'scored')
redis.call('HDEL', ATTEMPTS, group_id)
hold_bytes(group_id, size)
if #ARGV[6] > 0 then redis.call('HSET', KEYS[13], payload, ARGV[6]) end
return 'published'
