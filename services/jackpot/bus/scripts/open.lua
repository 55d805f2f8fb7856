-- Create what is missing. ARGV[1] becomes the incarnation unless there is one. Returns the incarnation.
local function ensure(stream, consumers)
  if redis.call('EXISTS', stream) == 1 then
    for _, group in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
      if group[2] == consumers then return end
    end
  end
  redis.call('XGROUP', 'CREATE', stream, consumers, '0', 'MKSTREAM')
end

ensure(ROLLOUTS, SCORERS)
ensure(SCORED, LEARNER)
redis.call('SETNX', INCARNATION, ARGV[1])
return redis.call('GET', INCARNATION)
