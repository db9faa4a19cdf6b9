-- Ends the leases of workers that have lost their connection. In a cell, this check is made once a second, by any of the workers.
-- A lease is ended if the channel of the worker has had no subscriber for `silence_ms`, and if the worker has not renewed by the time by
-- which a live worker would have. This applies only to workers whose connection this server has seen, and that have no run that is not durable.
-- The leases of the other workers end at their deadline.
-- Returns `LookResult`
--#include early
--#include neighbours
redis.call('PERSIST', k.workers()) -- no effect, but Redis allows it when its memory is full, and then allows the other writes
local LOOK_MS, SOONEST_MS = 900, 50

-- all_durable(incarnation): whether it has no run that is not durable. A key that is not the record of a run is ignored
local function all_durable(incarnation)
  for _, id in ipairs(redis.call('SMEMBERS', k.worker_runs(incarnation))) do
    if redis.pcall('HGET', k.run(id), 'durable') == '0' then return false end
  end
  return true
end

-- over_at(incarnation): when its lease must be ended; nil if this server has not seen its connection
local function over_at(incarnation)
  local seen_by, renewed_by = string.match(redis.call('HGET', k.watched(), incarnation) or '', '^(%S+) (%d+)$')
  if seen_by ~= server then return nil end
  redis.call('ZADD', k.silent(), 'NX', digits(NOW_MS), incarnation)
  return math.max(redis.call('ZSCORE', k.silent(), incarnation) + silence_ms, tonumber(renewed_by))
end

-- forget_strangers(): workers of an earlier version do not delete these entries when they reclaim runs
local function forget_strangers()
  if redis.call('HLEN', k.watched()) <= redis.call('ZCARD', k.workers()) then return end
  for _, incarnation in ipairs(redis.call('HKEYS', k.watched())) do
    if not redis.call('ZSCORE', k.workers(), incarnation) then forget_connection(incarnation) end
  end
end

-- looked(given_up[, next_ms]): the reply, with the news of this host
local function looked(given_up, next_ms)
  local now_joined, neighbours = news(host, joined)
  return reply{given_up = given_up, next_ms = next_ms, joined = now_joined, neighbours = neighbours}
end

local given_up, soonest = {}, nil
if server ~= '' and not is_off('connection') and redis.call('SET', k.looked(), '1', 'NX', 'PX', LOOK_MS) then
  for _, incarnation in ipairs(redis.call('ZRANGEBYSCORE', k.workers(), '(' .. digits(NOW_MS), '+inf')) do
    local heard_by = listeners(incarnation)
    if not heard_by then return looked({}) end
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
if not soonest or soonest >= NOW_MS + LOOK_MS then return looked(given_up) end
local wait_ms = math.max(soonest - NOW_MS, SOONEST_MS)
redis.call('PEXPIRE', k.looked(), digits(wait_ms))
return looked(given_up, wait_ms)
