-- Forgets a job if its record is still the one that was read. Safe to repeat.
-- KEYS: record, spec, transitions, all, queue, state index, label indexes …
-- ARGV: id, record
-- Returns 1 if the job is gone, 0 if its record has changed.
local stored = redis.call('GET', KEYS[1])
if stored and stored ~= ARGV[2] then
  return 0
end
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3])
for index = 4, #KEYS do
  redis.call('ZREM', KEYS[index], ARGV[1])
end
return 1
