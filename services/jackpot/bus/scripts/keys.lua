-- Prepended to every script: the job's keys, always in this order, and what the scripts share.
local INCARNATION, OPEN, TERMINAL, COUNTERS, BYTES, ATTEMPTS, ENTRIES, PAYLOADS, ROLLOUTS, SCORED, LEDGER, VALUES =
  unpack(KEYS, 1, 12)
local SCORERS, LEARNER = 'scorers', 'learner'

-- Set how many bytes of the budget a group holds.
local function hold_bytes(group_id, size)
  local held = tonumber(redis.call('HGET', BYTES, group_id) or 0)
  redis.call('HINCRBY', COUNTERS, 'bytes', size - held)
  redis.call('HSET', BYTES, group_id, size)
end

-- Take a group's entry off a stream; false if another consumer or the ledger already has.
local function take_off(stream, consumers, entry_id)
  if redis.call('XACK', stream, consumers, entry_id) == 0 then return false end
  redis.call('XDEL', stream, entry_id)
  return true
end

-- Put a group's claim on a stream; the payload itself is stored elsewhere.
local function put_on(stream, group_id, payload, size)
  local entry_id = redis.call('XADD', stream, '*', 'group', group_id, 'payload', payload, 'bytes', size)
  redis.call('HSET', ENTRIES, group_id, entry_id)
  redis.call('HSET', PAYLOADS, group_id, payload)
  return entry_id
end
