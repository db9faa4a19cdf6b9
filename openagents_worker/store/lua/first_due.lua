-- When the first run is due, or the first wait of a parked run is over: ms since 1970, '' if there is none. One command of an idle worker.
local due = redis.call('ZRANGEBYSCORE', k.due(), '-inf', '+inf', 'WITHSCORES', 'LIMIT', 0, 1)[2]
local timeout = redis.call('ZRANGEBYSCORE', k.timeouts(), '-inf', '+inf', 'WITHSCORES', 'LIMIT', 0, 1)[2]
if due and timeout then return tonumber(due) < tonumber(timeout) and due or timeout end
return due or timeout or ''
