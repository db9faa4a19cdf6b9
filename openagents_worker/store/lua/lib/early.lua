--#include time
-- A lease that ends before its time, and what shows that it should.
local GONE_MS = 600000 -- whoever was given up wrongly beats again long before that
local FALSE_ALARM = 'false alarm'

-- end_early(incarnation, by): its lease is over now; `by` says who saw that: `process` or `connection`
local function end_early(incarnation, by)
  redis.call('ZADD', k.workers(), digits(NOW_MS), incarnation)
  redis.call('ZREM', k.silent(), incarnation)
  redis.call('HSET', k.gone(incarnation), '', by)
  redis.call('PEXPIRE', k.gone(incarnation), GONE_MS)
  redis.call('HSET', k.lease_end(incarnation), 'died', '1')
  redis.call('PEXPIRE', k.lease_end(incarnation), GONE_MS)
end

-- is_off(by): too many leases were ended wrongly in this way
local function is_off(by) return redis.call('EXISTS', k.looks_off(by)) == 1 end

-- listeners(incarnation): how many connections are subscribed to its channel; nil where that may not be asked
local function listeners(incarnation)
  local answer = redis.pcall('PUBSUB', 'NUMSUB', k.alive(incarnation))
  if answer.err then return nil end
  return answer[2]
end

-- forget_fleet(incarnation): what its worker said of itself
local function forget_fleet(incarnation)
  redis.call('HDEL', k.fleet(), incarnation)
  redis.call('HDEL', k.fleet_lag(), incarnation)
end

-- forget_connection(incarnation): its connection says nothing about it (any more)
local function forget_connection(incarnation)
  redis.call('HDEL', k.watched(), incarnation)
  redis.call('ZREM', k.silent(), incarnation)
end
