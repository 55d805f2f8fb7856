-- Assign entries to a consumer. ARGV: incarnation, consumer group, consumer, cursor, count, lease in ms (0: reclaim
-- nothing now), reclaim cursor. KEYS[13]: the stream.
-- The consumer's pending entries beyond the cursor come first: an earlier call assigned them in a reply that never
-- arrived, or this consumer held them before it restarted. Returns the cursors, the last entry delivered to any
-- consumer, and {entry, group, payload, attempts so far, taken over because its lease expired}.
local stream, consumers, consumer, cursor, count = KEYS[13], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
local found = {}

local function add(entry, expired)
  local entry_id, fields = entry[1], entry[2]
  if not fields then -- deleted behind the bus's back: nothing is left to work on
    redis.call('XACK', stream, consumers, entry_id)
    return
  end
  local group_id, payload = fields[2], fields[4]
  local attempts = tonumber(redis.call('HGET', ATTEMPTS, group_id) or 0)
  found[#found + 1] = { entry_id, group_id, payload, attempts, expired }
end

local function read(from, limit)
  local reply = redis.call('XREADGROUP', 'GROUP', consumers, consumer, 'COUNT', limit, 'STREAMS', stream, from)
  for _, entry in ipairs(reply and reply[1][2] or {}) do
    add(entry, 0)
    cursor = entry[1]
  end
end

read(cursor, count)
local reclaim_cursor = ARGV[7]
if tonumber(ARGV[6]) > 0 and #found < count then
  local reply = redis.call('XAUTOCLAIM', stream, consumers, consumer, ARGV[6], reclaim_cursor, 'COUNT', count - #found)
  reclaim_cursor = reply[1]
  for _, entry in ipairs(reply[2]) do add(entry, 1) end
end
if #found < count then read('>', count - #found) end

local last = '0-0'
for _, group in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
  for i = 1, #group, 2 do
    if group[i] == 'last-delivered-id' then last = group[i + 1] end
  end
end
return { cursor, reclaim_cursor, last, found }
