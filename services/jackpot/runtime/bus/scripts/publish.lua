-- Queue a group for scoring. ARGV: incarnation, group, payload name, size, payload (empty if stored elsewhere).
-- KEYS[13]: the group's payloads.
local group_id, payload, size = ARGV[2], ARGV[3], tonumber(ARGV[4])
if redis.call('HEXISTS', TERMINAL, group_id) == 1 then return 'terminal' end
local state = redis.call('HGET', OPEN, group_id)
if state == 'published' or state == 'scored' then
  -- The client sends a command again when its reply was cut: the same payload name is the same publication.
  return redis.call('HGET', PAYLOADS, group_id) == payload and 'published' or 'duplicate'
end
if not state then redis.call('HINCRBY', COUNTERS, 'dispatched', 1) end
put_on(ROLLOUTS, group_id, payload, size)
redis.call('HSET', OPEN, group_id, 'published')
hold_bytes(group_id, size)
if #ARGV[5] > 0 then redis.call('HSET', KEYS[13], payload, ARGV[5]) end
return 'published'
