-- The server may have lost the job's state, and another process may have created it again. A client that does not know
-- this must not write into the new state.
if redis.call('GET', INCARNATION) ~= ARGV[1] then
  return redis.error_reply('BUSLOST the state of this job is gone or was created again')
end
