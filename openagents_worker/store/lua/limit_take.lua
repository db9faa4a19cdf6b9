-- An attempt asks to send a request to a model. OK: the request is reserved, and may be sent in delay_ms. BUSY: all concurrent requests are in use, and
-- no run waits: ask again. LATER: not within `wait_ms`, or other runs wait; delay_ms is an estimate. FENCED: the caller does not own the run.
-- Only OK reserves anything. A repeated call with the same `call` reserves it once. A run that cannot be parked does not wait for others,
-- and neither does any run while the runs that were called do not use the requests per minute.
-- Returns `Admission`
--#include limits
local state, owner_fence = unpack(redis.call('HMGET', k.run(run_id), 'state', 'fence'))
if state ~= STATE.running or owner_fence ~= fence then return reply{answer = 'FENCED'} end
local id = reservation(run_id, fence, call)
local limit = limit_with(name, {requests_per_minute, tokens_per_minute, max_concurrency})
local reserved = tonumber(redis.call('ZSCORE', k.limit_calls(name), id))
if reserved then return reply{answer = 'OK', delay_ms = math.max(0, math.ceil(reserved - NOW_MS))} end

local was_called = redis.call('ZSCORE', k.limit_called(name), run_id)
local others, called, longest_ms = 0, 0, wait_ms
if was_called then
  longest_ms = math.max(AHEAD_MS, wait_ms)
elseif may_park == 1 then
  others = redis.call('ZCARD', k.limit_queue(name)) - (redis.call('ZSCORE', k.limit_queue(name), run_id) and 1 or 0)
  called = expected(limit)
end
local delay_ms = (slot(limit) - NOW_US + called * interval_us(limit)) / 1000
if is_idle(limit) then others, delay_ms = 0, 0 end -- the runs that were called are late
local is_full = limit.max_concurrency > 0 and in_use(limit) + called >= limit.max_concurrency
if is_full or others > 0 or delay_ms > longest_ms then
  return reply{answer = is_full and others == 0 and delay_ms <= longest_ms and 'BUSY' or 'LATER',
    delay_ms = math.ceil(delay_ms + others * interval_us(limit) / 1000), wakes = serve(limit)}
end
local at_ms = reserve(limit, tokens, id)
redis.call('ZREM', k.limit_called(name), run_id)
redis.call('ZREM', k.limit_queue(name), run_id)
return reply{answer = 'OK', delay_ms = math.max(0, math.ceil(at_ms - NOW_US / 1000)), wakes = serve(limit)}
