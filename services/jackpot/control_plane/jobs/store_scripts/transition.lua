-- Replaces a job's record if it is still the one that was read. Safe to repeat.
-- KEYS: record, transitions, all, queue, index of the state before, index of the state after
-- ARGV: id, record before, record after, transition, priority, "is queued now" (1|0)
-- Returns 1 if the record is the new one, 0 if somebody was faster.
local record, transitions, all, queue, before, after = unpack(KEYS)
local id = ARGV[1]
local stored = redis.call('GET', record)
if stored == ARGV[3] then
  return 1
end
if stored ~= ARGV[2] then
  return 0
end
local number = redis.call('ZSCORE', all, id)
redis.call('SET', record, ARGV[3])
redis.call('RPUSH', transitions, ARGV[4])
redis.call('ZREM', before, id)
redis.call('ZADD', after, number, id)
if ARGV[6] == '1' then
  redis.call('ZADD', queue, -tonumber(ARGV[5]) * 2^40 + number, id)
else
  redis.call('ZREM', queue, id)
end
return 1
