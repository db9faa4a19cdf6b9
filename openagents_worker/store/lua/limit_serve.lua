-- Calls the next runs that wait for limits, for the limits that nobody has served for a while: at most `most` of them. Returns `Woken`
--#include limits
local wakes = {}
local names = redis.call('ZRANGEBYSCORE', k.limits(), '-inf', digits(NOW_MS), 'LIMIT', 0, most)
for _, name in ipairs(names) do
  redis.call('ZREM', k.limits(), name) -- `serve` adds it again if runs still wait
  for _, wake in ipairs(serve(limit_of(name))) do wakes[#wakes + 1] = wake end
end
return reply{wakes = wakes, examined = #names}
