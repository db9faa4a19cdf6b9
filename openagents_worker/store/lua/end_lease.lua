-- The lease of a worker process that was seen to be dead ends now; from there on all is as at the end of any lease. Returns OK | OVER
-- Only whom its own host knows by that process: of any other incarnation nobody has seen anything.
--#include time
if redis.call('HGET', k.host(host), incarnation) ~= process then return 'OVER' end
local deadline = tonumber(redis.call('ZSCORE', k.workers(), incarnation))
if not deadline or deadline <= NOW_MS then return 'OVER' end
redis.call('ZADD', k.workers(), digits(NOW_MS), incarnation)
return 'OK'
