--#include end_run
-- A run that does not wait until its session is free: it ends the run that works, and is the next one.
local FORCED_AFTER_MS = 5000 -- the time of the interrupted run to end by itself; then it is ended by force

-- interrupted(run, mode, by): ends a run because the run `by` enters its session, or requests its end. Returns wake-ups.
-- `rollback`: it leaves nothing in the session, so it ends at once unless a worker executes it. `interrupt`: see says_so_itself
local function interrupted(run, mode, by)
  local reason = (mode == 'rollback' and 'rolled back by the run ' or 'interrupted by the run ') .. by
  local stops_already = run.cancel == '1'
  if not stops_already and mode == 'rollback' and run.owner == '' then return cancelled(run, reason) end
  if run.force_at == 0 then
    local force_at = digits(NOW_MS + FORCED_AFTER_MS)
    redis.call('HSET', k.run(run.id), 'force_at', force_at)
    redis.call('ZADD', k.due(), force_at, run.id)
  end
  if stops_already then return {} end
  redis.call('HSET', k.run(run.id), 'cancel', '1', 'cancel_reason', reason, 'interrupted', mode)
  append(run, {'run.cancel_requested', '{"reason":' .. q(reason) .. ',"mode":' .. q(mode) .. ',"by_run_id":' .. q(by) .. '}'})
  if run.owner ~= '' then
    redis.call('SADD', k.worker_box(run.owner), run.id)
    redis.call('PUBLISH', k.notices(run.owner), run.id)
    return {}
  end
  if redis.call('HGET', k.session(run.session), 'holder') ~= run.id then return {} end -- it ends when it becomes the holder
  redis.call('HSET', k.run(run.id), 'state', STATE.queued)
  redis.call('HDEL', k.run(run.id), 'waits')
  redis.call('ZREM', k.timeouts(), run.id)
  return {wake_of(run)}
end

-- enter(run): the run enters its session, as its request wants if the session is busy. Returns wake-ups
local function enter(run)
  local own = place(run)
  local wakes = {own}
  local held = holder(run.session)
  if run.on_busy == '' or held == run.id then return wakes end
  local ordinal = redis.call('ZSCORE', k.session_queue(run.session), run.id)
  -- An interrupting run that waits has interrupted those before it: only the last one of them goes on
  local before = redis.call('ZREVRANGEBYSCORE', k.session_queue(run.session), '(' .. ordinal, '-inf', 'LIMIT', 0, 1)[1]
  local bottom = held and lowest(run.session, held) or '' -- a shared child ends with the run that has delegated to it
  for _, id in ipairs({before or '', bottom}) do
    local other = id ~= '' and load(id)
    if other and not TERMINAL[other.state] then add(wakes, interrupted(other, run.on_busy, run.id)) end
  end
  if bottom ~= (held or '') then
    local other = load(bottom)
    if other and not TERMINAL[other.state] then add(wakes, end_children(other, false)) end
    local top = load(held)
    if top and not TERMINAL[top.state] then add(wakes, interrupted(top, 'rollback', run.id)) end
  end
  return wakes
end
