-- Give groups their one terminal state. ARGV: incarnation, 'trained' or 'dropped', reason, detail, then per group: id,
-- step, entry (if given, the group only ends if this is still its claim). KEYS[13 …]: the groups' payloads, same order.
-- Returns per group: '' with the payload's name if it ended now, else its earlier terminal state, or 'lost'.
local state, reason, detail = ARGV[2], ARGV[3], ARGV[4]
local name = reason == '' and state or state .. ':' .. reason
local results = {}
for i = 5, #ARGV, 3 do
  local group_id, step, claim, payloads = ARGV[i], ARGV[i + 1], ARGV[i + 2], KEYS[13 + (i - 5) / 3]
  local ended = redis.call('HGET', TERMINAL, group_id)
  local entry_id = redis.call('HGET', ENTRIES, group_id)
  if ended then
    results[#results + 1] = { ended, '' }
  elseif claim ~= '' and claim ~= entry_id then
    results[#results + 1] = { 'lost', '' }
  else
    local was = redis.call('HGET', OPEN, group_id)
    -- A group that the bus does not know, or no longer knows, is registered here, so that the counters add up.
    if not was then redis.call('HINCRBY', COUNTERS, 'dispatched', 1) end
    -- Not take_off: an entry that no consumer has read cannot be acknowledged, but must be removed too.
    if was == 'published' then
      redis.call('XACK', ROLLOUTS, SCORERS, entry_id)
      redis.call('XDEL', ROLLOUTS, entry_id)
    elseif was == 'scored' then
      redis.call('XACK', SCORED, LEARNER, entry_id)
      redis.call('XDEL', SCORED, entry_id)
    end
    results[#results + 1] = { '', redis.call('HGET', PAYLOADS, group_id) or '' }
    hold_bytes(group_id, 0)
    for _, key in ipairs({ OPEN, BYTES, ATTEMPTS, ENTRIES, PAYLOADS }) do redis.call('HDEL', key, group_id) end
    redis.call('UNLINK', payloads)
    redis.call('HSET', TERMINAL, group_id, name)
    redis.call('HINCRBY', COUNTERS, name, 1)
    redis.call('XADD', LEDGER, '*', 'group', group_id, 'state', state, 'reason', reason, 'step', step, 'detail', detail)
  end
end
return results
