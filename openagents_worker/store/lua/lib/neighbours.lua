--#include time
-- The workers of one host. A worker of an earlier version stands in no such list: only its lease tells of it.
local HOST_MS = 86400000 -- after its last worker's last beat: longer than any lease that must be ended early

-- neighbours(host): incarnation, process, incarnation, process … of those whose lease is good; whose lease is gone is forgotten
local function neighbours(host)
  if host == '' then return {} end
  local found, known = {}, redis.call('HGETALL', k.host(host))
  for i = 1, #known, 2 do
    local deadline = tonumber(redis.call('ZSCORE', k.workers(), known[i]))
    if not deadline then
      redis.call('HDEL', k.host(host), known[i])
    elseif deadline > NOW_MS then
      found[#found + 1] = known[i]
      found[#found + 1] = known[i + 1]
    end
  end
  redis.call('PEXPIRE', k.host(host), HOST_MS)
  return found
end
