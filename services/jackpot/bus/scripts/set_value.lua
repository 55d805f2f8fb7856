-- Store a small value for the job. ARGV: incarnation, name, value.
redis.call('HSET', VALUES, ARGV[2], ARGV[3])
return 'set'
