-- Takes or keeps the lead for a while. Safe to repeat.
-- KEYS: lead
-- ARGV: who asks, for how many milliseconds (0 gives the lead up)
-- Returns 1 if the one who asks leads now.
local leader = redis.call('GET', KEYS[1])
if leader and leader ~= ARGV[1] then
  return 0
end
if tonumber(ARGV[2]) == 0 then
  redis.call('DEL', KEYS[1])
  return 0
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
