-- A page of an index, newest first, with the records: one round trip.
-- KEYS: index
-- ARGV: score to begin with, how many, prefix of the records' keys
-- Returns {ids and their numbers, …, records, …}; one more id than asked for if there are more.
local found = redis.call('ZREVRANGEBYSCORE', KEYS[1], ARGV[1], '-inf', 'WITHSCORES', 'LIMIT', 0, ARGV[2] + 1)
local keys = {}
for index = 1, math.min(#found / 2, tonumber(ARGV[2])) do
  keys[index] = ARGV[3] .. found[2 * index - 1]
end
local records = #keys > 0 and redis.call('MGET', unpack(keys)) or {}
return {found, records}
