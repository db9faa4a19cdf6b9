-- Sends a notice to a worker that is alive: it is put into the worker's box, which the worker gets with its heartbeats, and published on its channel.
-- Returns OK | GONE (its lease is over, or there was none)
--#include time
local deadline = tonumber(redis.call('ZSCORE', k.workers(), incarnation))
if not deadline or deadline <= NOW_MS then return 'GONE' end
redis.call('SADD', k.worker_box(incarnation), notice)
redis.call('PUBLISH', k.notices(incarnation), notice)
return 'OK'
