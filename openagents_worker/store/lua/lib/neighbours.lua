--#include time
-- The workers of one host. A worker of an earlier version is not in this hash: only its lease shows that it exists.
-- Field '' counts the registrations: a worker that has read the hash at this count knows all other workers of the host.
local HOST_MS = 86400000 -- after the last check by a worker of this host: longer than any lease

local function join(host, incarnation, process)
  if host == '' then return end
  redis.call('HSET', k.host(host), incarnation, process)
  if type(redis.pcall('HINCRBY', k.host(host), '', 1)) ~= 'number' then redis.call('HSET', k.host(host), '', '1') end
end

-- neighbours(host): incarnation, process, incarnation, process … of the workers with a valid lease; workers without a lease are removed
local function neighbours(host)
  if host == '' then return {} end
  local found, known = {}, redis.call('HGETALL', k.host(host))
  for i = 1, #known, 2 do
    local deadline = known[i] ~= '' and tonumber(redis.call('ZSCORE', k.workers(), known[i]))
    if deadline and deadline > NOW_MS then
      found[#found + 1] = known[i]
      found[#found + 1] = known[i + 1]
    elseif not deadline and known[i] ~= '' then
      redis.call('HDEL', k.host(host), known[i])
    end
  end
  redis.call('PEXPIRE', k.host(host), HOST_MS)
  return found
end

-- news(host, joined): the count of registrations, and neighbours(host) if the count has changed since `joined`, else nil
local function news(host, joined)
  if host == '' then return '', nil end
  local now_joined = redis.call('HGET', k.host(host), '') or ''
  if now_joined ~= joined then return now_joined, neighbours(host) end
  redis.call('PEXPIRE', k.host(host), HOST_MS)
  return joined, nil
end
