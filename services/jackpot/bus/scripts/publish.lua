-- Put a group on the bus: queued for scoring, or ready to be trained on at once. ARGV: incarnation, group, 'published' or
-- 'scored', payload name, size, payload (empty if stored elsewhere). KEYS[13]: the group's payloads.
local group_id, stage, payload, size = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
if redis.call('HEXISTS', TERMINAL, group_id) == 1 then return 'terminal' end
local state = redis.call('HGET', OPEN, group_id)
if state == 'published' or state == 'scored' then
  -- The client sends a command again when its reply is lost: the same payload name means the same publication.
  return redis.call('HGET', PAYLOADS, group_id) == payload and 'published' or 'duplicate'
end
if not state then redis.call('HINCRBY', COUNTERS, 'dispatched', 1) end
put_on(stage == 'scored' and SCORED or ROLLOUTS, group_id, payload, size)
redis.call('HSET', OPEN, group_id, stage)
hold_bytes(group_id, size)
if #ARGV[6] > 0 then redis.call('HSET', KEYS[13], payload, ARGV[6]) end
return 'published'
