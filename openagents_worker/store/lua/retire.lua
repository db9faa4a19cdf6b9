-- A worker process ends by itself: without runs its lease is gone, with runs it is over now, for reclaim to see; it has not died of them.
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
