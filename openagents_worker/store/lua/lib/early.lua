--#include time
-- Ending a lease before its deadline, and the checks for this.
local GONE_MS = 600000 -- a live worker whose lease was ended sends a heartbeat long before this
local FALSE_ALARM = 'false alarm'

-- end_early(incarnation, by): ends the lease now; `by` is the check that found the worker dead: `process` or `connection`
local function end_early(incarnation, by)
  redis.call('ZADD', k.workers(), digits(NOW_MS), incarnation)
  redis.call('ZREM', k.silent(), incarnation)
  redis.call('HSET', k.gone(incarnation), '', by)
  redis.call('PEXPIRE', k.gone(incarnation), GONE_MS)
  redis.call('HSET', k.lease_end(incarnation), 'died', '1')
  redis.call('PEXPIRE', k.lease_end(incarnation), GONE_MS)
end

-- is_off(by): whether this check is switched off, because it was wrong too often
local function is_off(by) return redis.call('EXISTS', k.looks_off(by)) == 1 end

-- listeners(incarnation): the number of connections that are subscribed to its channel; nil if the user may not run PUBSUB
local function listeners(incarnation)
  local answer = redis.pcall('PUBSUB', 'NUMSUB', k.alive(incarnation))
  if answer.err then return nil end
  return answer[2]
end

-- forget_fleet(incarnation): deletes the information that its worker has stored
local function forget_fleet(incarnation)
  redis.call('HDEL', k.fleet(), incarnation)
  redis.call('HDEL', k.fleet_lag(), incarnation)
  redis.call('DEL', k.worker_parts(incarnation))
end

-- forget_connection(incarnation): its connection is not checked (any more)
local function forget_connection(incarnation)
  redis.call('HDEL', k.watched(), incarnation)
  redis.call('ZREM', k.silent(), incarnation)
end
