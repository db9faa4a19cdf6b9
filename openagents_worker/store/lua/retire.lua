-- A worker process stops. Without runs, its lease is deleted (GONE). With runs, its lease ends now, so that `reclaim` takes the runs (OVER); none of
-- them is suspected of having killed the process.
--#include deaths
--#include early
forget_connection(incarnation)
forget_fleet(incarnation)
if host ~= '' then redis.call('HDEL', k.host(host), incarnation) end
local lease = redis.call('ZSCORE', k.workers(), incarnation)
if not lease then return 'GONE' end
if redis.call('SCARD', k.worker_runs(incarnation)) == 0 then
  redis.call('ZREM', k.workers(), incarnation)
  redis.call('DEL', k.worker_runs(incarnation), k.worker_box(incarnation), k.worker_suspect(incarnation), k.suspects(incarnation))
  return 'GONE'
end
redis.call('ZADD', k.workers(), digits(NOW_MS), incarnation)
answers(incarnation)
return 'OVER'
