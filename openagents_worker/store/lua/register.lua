-- A worker process starts: stores its lease, its host, and the agents that it can execute. `info` is a JSON object of the worker. The start time
-- is appended to its text, because decoding and encoding JSON in Lua loses empty lists. `previous` is an earlier incarnation of the same process
-- that has lost its lease although the process is alive. Returns `Registration`
--#include deaths
--#include early
--#include neighbours
redis.call('ZADD', k.workers(), digits(NOW_MS + lease_ms), incarnation)
redis.call('DEL', k.lease_end(incarnation), k.lease_end_runs(incarnation)) -- a new incarnation has none; only tests use an id again
for i = 1, #agents, 2 do redis.call('HSET', k.agents(), agents[i], agents[i + 1]) end -- id, JSON, id, JSON, …
if previous ~= '' then answers(previous) end
-- A worker of the previous version does not delete these entries when it reclaims runs
for _, other in ipairs(redis.call('HKEYS', k.fleet())) do
  if not redis.call('ZSCORE', k.workers(), other) then forget_fleet(other) end
end
if info ~= '' then
  redis.call('HSET', k.fleet(), incarnation, string.sub(info, 1, -2) .. ',"started_at":' .. digits(NOW_MS) .. '}')
end
forget_connection(incarnation) -- the first renewal stores it
join(host, incarnation, process)
local data_id = redis.call('GET', k.data_id()) -- a key of a wrong type is moved aside now
if not data_id then
  data_id = digits(NOW_MS)
  redis.call('SET', k.data_id(), data_id)
end
return reply{neighbours = neighbours(host), data_id = data_id}
