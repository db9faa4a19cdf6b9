--#include parked
-- Limits of the fleet. A limit has a name, and numbers that each caller passes: requests and tokens per minute, and concurrent requests.
-- Requests and tokens are paced with the generic cell rate algorithm (GCRA, ITU-T I.371): `next_us` is when the next request would be on schedule.
-- A request may be ahead of the schedule by BURST_US at most, so no window of time gets much more than its share, also after an idle time.
-- A run that has to wait for longer than a call waits is parked in a queue of the limit. `serve` calls the next runs of the queue shortly before
-- there is room for them.
local BURST_US = 250000 -- 2.5 % of ten seconds
local AHEAD_MS = 2000 -- runs are called so long before their requests may be sent: a wake-up takes time. They wait inside their calls
local CALLED_MS = 10000 -- a run that was called and has not arrived after this time blocks no room for others. It may still arrive
local LOOK_AGAIN_MS = 1000 -- when workers check a queue again, if no request begins or ends in between
local LONGEST_COST_US = 3600000000 -- a request with more tokens than an hour allows counts as an hour
local LIMIT_KEPT_MS = 86400000 -- longer than any of these times
local CALL_KEPT_MS = 604800000 -- the longest time that the agents file accepts for a call
local EXAMINED = 20 -- reservations in one call
local SERVED = 100 -- runs in one call
local NUMBERS = {'requests_per_minute', 'tokens_per_minute', 'max_concurrency'} -- 0: no limit
local LIMIT_FIELDS = {'requests_per_minute', 'tokens_per_minute', 'max_concurrency', 'next_us', 'next_tokens_us', 'blocked_until_ms', 'tokens'}

local function keep(key) redis.call('PEXPIRE', key, LIMIT_KEPT_MS) end

-- limit_of(name): the limit as a table of numbers
local function limit_of(name)
  local limit, values = {name = name}, redis.call('HMGET', k.limit(name), unpack(LIMIT_FIELDS))
  for i, field in ipairs(LIMIT_FIELDS) do limit[field] = count_of(values[i]) end
  return limit
end

-- limit_with(name, numbers): the same, with the numbers of the caller, which are stored for `serve`
local function limit_with(name, numbers)
  local limit = limit_of(name)
  for i, field in ipairs(NUMBERS) do
    if limit[field] ~= numbers[i] then
      limit[field] = numbers[i]
      redis.call('HSET', k.limit(name), field, digits(numbers[i]))
      keep(k.limit(name))
    end
  end
  return limit
end

local function interval_us(limit) return limit.requests_per_minute > 0 and 60000000 / limit.requests_per_minute or 0 end

local function cost_us(limit, tokens)
  return limit.tokens_per_minute > 0 and math.min(tokens * 60000000 / limit.tokens_per_minute, LONGEST_COST_US) or 0
end

-- slot(limit): the earliest time of the next request, µs
local function slot(limit)
  local at = math.max(NOW_US, limit.blocked_until_ms * 1000)
  if limit.requests_per_minute > 0 then at = math.max(at, limit.next_us - BURST_US) end
  if limit.tokens_per_minute > 0 then at = math.max(at, limit.next_tokens_us - BURST_US) end
  return at
end

-- reservation(R, F, call): the id of a reserved request of the attempt with the fence F
local function reservation(R, F, call) return F .. ' ' .. enc(call) .. ' ' .. R end

-- is_idle(limit): whether nothing has used the schedule for so long that time is being lost
local function is_idle(limit)
  return limit.requests_per_minute + limit.tokens_per_minute > 0 and limit.next_us <= NOW_US and limit.next_tokens_us <= NOW_US
    and limit.blocked_until_ms <= NOW_MS
end

-- holds(id): whether the attempt that made this reservation still owns its run. An attempt that has ended, or whose worker died, does not
local function holds(id)
  local F, R = string.match(id, '^(%S+) %S+ (.*)$')
  if not R then return false end
  local state, fence = unpack(redis.call('HMGET', k.run(R), 'state', 'fence'))
  return state == STATE.running and fence == F
end

-- forget_ended(limit): removes reservations of attempts that have ended, among those that were examined the longest time ago
local function forget_ended(limit)
  local oldest = redis.call('ZRANGE', k.limit_calls(limit.name), 0, EXAMINED - 1, 'WITHSCORES')
  for i = 1, #oldest, 2 do
    if not holds(oldest[i]) then
      redis.call('ZREM', k.limit_calls(limit.name), oldest[i])
    elseif tonumber(oldest[i + 1]) < NOW_MS then
      redis.call('ZADD', k.limit_calls(limit.name), digits(NOW_MS), oldest[i])
    end
  end
end

-- in_use(limit): the number of concurrent requests. If the limit is full, reservations of attempts that have ended are removed
local function in_use(limit)
  local key = k.limit_calls(limit.name)
  if redis.call('ZCARD', key) >= limit.max_concurrency then forget_ended(limit) end
  return redis.call('ZCARD', key)
end

-- expected(limit): the number of runs that were called and have not arrived yet
local function expected(limit) return redis.call('ZCOUNT', k.limit_called(limit.name), digits(NOW_MS - CALLED_MS), '+inf') end

-- reserve(limit, tokens, id): the time of this request, ms
local function reserve(limit, tokens, id)
  if limit.max_concurrency == 0 then forget_ended(limit) end -- lists show how many are in use
  local at = slot(limit)
  if limit.requests_per_minute > 0 then limit.next_us = math.max(at, limit.next_us) + interval_us(limit) end
  if limit.tokens_per_minute > 0 then limit.next_tokens_us = math.max(at, limit.next_tokens_us) + cost_us(limit, tokens) end
  limit.tokens = tokens
  redis.call('HSET', k.limit(limit.name), 'next_us', digits(limit.next_us), 'next_tokens_us', digits(limit.next_tokens_us), 'tokens', digits(tokens))
  redis.call('ZADD', k.limit_calls(limit.name), digits(at / 1000), id)
  redis.call('ZREMRANGEBYSCORE', k.limit_calls(limit.name), '-inf', digits(NOW_MS - CALL_KEPT_MS)) -- their workers died, and nobody needed the room
  redis.call('PEXPIRE', k.limit_calls(limit.name), CALL_KEPT_MS)
  keep(k.limit(limit.name))
  return at / 1000
end

-- enqueue(name, tenant, R): the run waits. Each tenant gets every n-th place, if n tenants wait. A run that was called keeps the first place
local function enqueue(name, tenant, R)
  local queue, tenants = k.limit_queue(name), k.limit_tenants(name)
  local first = tonumber(redis.call('ZRANGE', queue, 0, 0, 'WITHSCORES')[2]) or 0
  if redis.call('ZREM', k.limit_called(name), R) == 1 then
    redis.call('ZADD', k.limit_queue(name), digits(first), R)
  elseif not redis.call('ZSCORE', queue, R) then
    local last = redis.call('HGET', tenants, tenant)
    local place = math.max(first, last and count_of(last) + 1 or 0)
    if redis.call('HLEN', tenants) > 1000 + redis.call('ZCARD', queue) then redis.call('DEL', k.limit_tenants(name)) end
    redis.call('HSET', k.limit_tenants(name), tenant, digits(place))
    redis.call('ZADD', k.limit_queue(name), digits(place), R)
    keep(k.limit_tenants(name))
  end
  keep(k.limit_queue(name))
end

-- room(limit): the number of runs that can be called now
local function room(limit)
  local ahead_us = NOW_US + AHEAD_MS * 1000 - slot(limit)
  if ahead_us < 0 then return 0 end
  local count = SERVED
  if limit.requests_per_minute > 0 then count = math.min(count, math.floor(ahead_us / interval_us(limit)) + 1) end
  local cost = cost_us(limit, limit.tokens)
  if cost > 0 then count = math.min(count, math.floor(ahead_us / cost) + 1) end
  if limit.max_concurrency > 0 then count = math.min(count, limit.max_concurrency - in_use(limit)) end
  return count - expected(limit)
end

local function is_parked_at(name, run)
  return run and PARKED[run.state] and redis.call('HGET', k.run(run.id), 'queued_at') == run.fence .. ' ' .. name
end

-- serve(limit): calls the next runs of the queue; returns their wake-ups. An entry of a run that does not wait here any more is dropped
local function serve(limit)
  local wakes, queue = {}, k.limit_queue(limit.name)
  if redis.call('ZCARD', queue) == 0 then return wakes end
  local free = room(limit)
  for _, R in ipairs(free > 0 and redis.call('ZRANGE', queue, 0, SERVED - 1) or {}) do
    if free <= 0 then break end
    local run = load(R)
    redis.call('ZREM', k.limit_queue(limit.name), R)
    if is_parked_at(limit.name, run) then
      redis.call('ZADD', k.limit_called(limit.name), digits(NOW_MS), R)
      wakes[#wakes + 1] = unpark(run, {kind = 'limit', name = limit.name})
      free = free - 1
    end
  end
  if #wakes > 0 then
    redis.call('ZREMRANGEBYSCORE', k.limit_called(limit.name), '-inf', digits(NOW_MS - LIMIT_KEPT_MS)) -- cancelled on their way
    keep(k.limit_called(limit.name))
  end
  if redis.call('ZCARD', queue) == 0 then
    redis.call('DEL', k.limit_tenants(limit.name))
    redis.call('ZREM', k.limits(), limit.name)
  else
    redis.call('ZADD', k.limits(), digits(NOW_MS + LOOK_AGAIN_MS), limit.name)
    keep(k.limits())
  end
  return wakes
end
