-- Stores a new job unless its idempotency key is known. Safe to repeat.
-- KEYS: record, spec, transitions, all, sequence, queue, state index, idempotency key, label indexes …
-- ARGV: id, record, spec, transition, priority, "owner's key is used" (1|0), fingerprint, seconds the key is kept
-- Returns {id of the job, fingerprint it was made with, 1 if it is new}.
local record, spec, transitions, all, sequence, queue, state, idempotency = unpack(KEYS, 1, 8)
local id, fingerprint = ARGV[1], ARGV[7]
if ARGV[6] == '1' then
  local known = redis.call('HMGET', idempotency, 'id', 'fingerprint')
  if known[1] then
    return {known[1], known[2], 0}
  end
  redis.call('HSET', idempotency, 'id', id, 'fingerprint', fingerprint)
  redis.call('EXPIRE', idempotency, ARGV[8])
end
if redis.call('EXISTS', record) == 1 then
  if redis.call('GET', spec) == ARGV[3] then
    return {id, fingerprint, 1}
  end
  return redis.error_reply('EXISTS ' .. id)
end
local number = redis.call('INCR', sequence)
redis.call('SET', record, ARGV[2])
redis.call('SET', spec, ARGV[3])
redis.call('RPUSH', transitions, ARGV[4])
redis.call('ZADD', all, number, id)
redis.call('ZADD', state, number, id)
redis.call('ZADD', queue, -tonumber(ARGV[5]) * 2^40 + number, id)
for index = 9, #KEYS do
  redis.call('ZADD', KEYS[index], number, id)
end
return {id, fingerprint, 1}
