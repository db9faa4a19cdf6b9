-- When the first run is due, or the first wait of a parked run is over, and when the queue of the first limit of the fleet is checked. One command of
-- an idle worker. Returns `FirstDue`
local due = redis.call('ZRANGEBYSCORE', k.due(), '-inf', '+inf', 'WITHSCORES', 'LIMIT', 0, 1)[2]
local timeout = redis.call('ZRANGEBYSCORE', k.timeouts(), '-inf', '+inf', 'WITHSCORES', 'LIMIT', 0, 1)[2]
local limit = redis.call('ZRANGEBYSCORE', k.limits(), '-inf', '+inf', 'WITHSCORES', 'LIMIT', 0, 1)[2]
if due and timeout and tonumber(timeout) < tonumber(due) then due = timeout end
return reply{run_ms = due or timeout, limit_ms = limit}
