-- The server may have lost the job's state, and another process may have begun anew: nobody writes into that unaware.
if redis.call('GET', INCARNATION) ~= ARGV[1] then
  return redis.error_reply('BUSLOST the state of this job is gone or was begun anew')
end
