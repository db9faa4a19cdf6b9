-- When the first run is due, the first wait of a parked run is over, or children must end because their parent has ended; and when the queue of the
-- first limit of the fleet is checked. One command of an idle worker. Returns `FirstDue`
local first
for _, key in ipairs({k.due(), k.timeouts(), k.stopping()}) do
  local at = redis.call('ZRANGEBYSCORE', key, '-inf', '+inf', 'WITHSCORES', 'LIMIT', 0, 1)[2]
  if at and (not first or tonumber(at) < tonumber(first)) then first = at end
end
local limit = redis.call('ZRANGEBYSCORE', k.limits(), '-inf', '+inf', 'WITHSCORES', 'LIMIT', 0, 1)[2]
return reply{run_ms = first, limit_ms = limit}
