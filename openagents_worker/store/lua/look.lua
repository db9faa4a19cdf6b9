-- Looks for workers whose connection is gone and has not come back; one look a second a cell, whoever makes it.
-- A worker is given up when its channel has had no listener for `silence_ms` and it has not renewed by the time by which it would have
-- if it lived. Only one whose connection this server has seen, and with no run that is not durable: the others are left to their leases.
-- Returns incarnations given up, ms until the next look is worth while ('' no sooner than usual), news of this host
--#include early
--#include neighbours
redis.call('PERSIST', k.workers()) -- changes nothing, but a full Redis takes it, and then the rest of the script
local LOOK_MS, SOONEST_MS = 900, 50

-- A key that is not the record of a run says nothing
local function all_durable(incarnation)
  for _, id in ipairs(redis.call('SMEMBERS', k.worker_runs(incarnation))) do
    if redis.pcall('HGET', k.run(id), 'durable') == '0' then return false end
  end
  return true
end

-- over_at(incarnation): when it is to be given up, nil while it is heard of or nothing can be said
local function over_at(incarnation)
  local seen_by, renewed_by = string.match(redis.call('HGET', k.watched(), incarnation) or '', '^(%S+) (%d+)$')
  if seen_by ~= server then return nil end
  redis.call('ZADD', k.silent(), 'NX', digits(NOW_MS), incarnation)
  return math.max(redis.call('ZSCORE', k.silent(), incarnation) + silence_ms, tonumber(renewed_by))
end

-- What workers of an earlier version have reclaimed is still noted here
local function forget_strangers()
  if redis.call('HLEN', k.watched()) <= redis.call('ZCARD', k.workers()) then return end
  for _, incarnation in ipairs(redis.call('HKEYS', k.watched())) do
    if not redis.call('ZSCORE', k.workers(), incarnation) then forget_connection(incarnation) end
  end
end

local given_up, soonest = {}, nil
if server ~= '' and not is_off('connection') and redis.call('SET', k.looked(), '1', 'NX', 'PX', LOOK_MS) then
  for _, incarnation in ipairs(redis.call('ZRANGEBYSCORE', k.workers(), '(' .. digits(NOW_MS), '+inf')) do
    local heard_by = listeners(incarnation)
    if not heard_by then return {{}, '', news(host, joined)} end
    if heard_by > 0 then
      redis.call('ZREM', k.silent(), incarnation)
    else
      local at = over_at(incarnation)
      if at and at > NOW_MS then
        soonest = math.min(soonest or at, at)
      elseif at and all_durable(incarnation) then
        end_early(incarnation, 'connection')
        given_up[#given_up + 1] = incarnation
      end
    end
  end
  forget_strangers()
end
if not soonest or soonest >= NOW_MS + LOOK_MS then return {given_up, '', news(host, joined)} end
local wait_ms = math.max(soonest - NOW_MS, SOONEST_MS)
redis.call('PEXPIRE', k.looked(), digits(wait_ms))
return {given_up, digits(wait_ms), news(host, joined)}
