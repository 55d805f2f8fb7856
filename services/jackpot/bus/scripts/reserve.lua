-- Register a group as dispatched and reserve its bytes. ARGV: incarnation, group, bytes, budget, urgent.
local group_id, size, budget = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local ended = redis.call('HGET', TERMINAL, group_id)
if ended then return ended end
if redis.call('HEXISTS', OPEN, group_id) == 1 then return 'reserved' end
local used = tonumber(redis.call('HGET', COUNTERS, 'bytes') or 0)
if ARGV[5] == '0' and used + size > budget then return 'full' end
redis.call('HSET', OPEN, group_id, 'dispatched')
redis.call('HINCRBY', COUNTERS, 'dispatched', 1)
hold_bytes(group_id, size)
return 'reserved'
