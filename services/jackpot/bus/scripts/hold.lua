-- Renew leases; only of entries that are still this consumer's. ARGV: incarnation, consumer group, consumer, then per
-- entry: entry, group, attempt (0 leaves the count alone). KEYS[13]: the stream. Returns 1 or 0 per entry.
local stream, consumers, consumer = KEYS[13], ARGV[2], ARGV[3]
local held = {}
for i = 4, #ARGV, 3 do
  local entry_id, group_id, attempt = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2])
  local mine = #redis.call('XPENDING', stream, consumers, entry_id, entry_id, 1, consumer) == 1
  if mine then
    redis.call('XCLAIM', stream, consumers, consumer, 0, entry_id, 'JUSTID')
    -- The attempt's number is set, not incremented: a command that is sent again counts once.
    if attempt > tonumber(redis.call('HGET', ATTEMPTS, group_id) or 0) then
      redis.call('HSET', ATTEMPTS, group_id, attempt)
    end
  end
  held[#held + 1] = mine and 1 or 0
end
return held
