--#include time
-- The workers of one host. A worker of an earlier version stands in no such list: only its lease tells of it.
-- Field '' counts who has joined: who knows that count knows all others, as those who leave need not be told of.
local HOST_MS = 86400000 -- after its last worker's last look: longer than any lease that must be ended early

local function join(host, incarnation, process)
  if host == '' then return end
  redis.call('HSET', k.host(host), incarnation, process)
  if type(redis.pcall('HINCRBY', k.host(host), '', 1)) ~= 'number' then redis.call('HSET', k.host(host), '', '1') end
end

-- neighbours(host): incarnation, process, incarnation, process … of those whose lease is good; whose lease is gone is forgotten
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

-- news(host, joined): how many have joined, and neighbours(host) unless that is what is known already
local function news(host, joined)
  if host == '' then return {'', {}} end
  local now_joined = redis.call('HGET', k.host(host), '') or ''
  if now_joined ~= joined then return {now_joined, neighbours(host)} end
  redis.call('PEXPIRE', k.host(host), HOST_MS)
  return {joined, {}}
end
