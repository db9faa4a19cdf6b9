-- Wakes runs that are due: retries become queued, delayed runs enter their sessions, a parked run whose wait has timed out continues, and a run
-- that was not started before it expired ends. At most `limit` runs in a call. Returns `WokenRuns`. Event run.woken
-- A run that was interrupted and has not ended in time is ended by force. `overdue` are those that the caller must end, because they
-- leave a turn in the transcript. Children that must end because their parent has ended, and that were too many for the script that ended it, end here.
--#include interrupt
--#include parked
local OVERDUE_AGAIN_MS = 1000 -- so long the caller has to end an overdue run
-- timed_out(R): the wait of a parked run that ends first
local function timed_out(R)
  local first = {}
  for _, wait in ipairs(waits_of(R)) do
    local until_ms = tonumber(wait.until_ms)
    if until_ms and until_ms < (tonumber(first.until_ms) or math.huge) then first = wait end
  end
  return first
end

local wakes, overdue = {}, {}
local ids = redis.call('ZRANGEBYSCORE', k.due(), '-inf', digits(NOW_MS), 'LIMIT', 0, limit)
for _, id in ipairs(ids) do
  local run = load(id)
  local more = {}
  redis.call('ZREM', k.due(), id)
  if run and run.force_at > 0 and not TERMINAL[run.state] then
    -- Else it ends when it becomes the holder, or it was interrupted by a run that became due in this call
    local is_overdue = run.force_at <= NOW_MS and holder(run.session) == id
    if is_overdue and not says_so_itself(run) then
      more = cancelled(run, run.cancel_reason)
    else
      if is_overdue then overdue[#overdue + 1] = id end
      redis.call('ZADD', k.due(), digits(math.max(run.force_at, NOW_MS + OVERDUE_AGAIN_MS)), id)
    end
  elseif run and run.owner == '' and not TERMINAL[run.state] then
    if expired(run) then
      more = cancelled(run, 'expired')
    elseif run.due <= NOW_MS and run.state == STATE.retrying then
      redis.call('HSET', k.run(id), 'state', STATE.queued)
      look_in_time(run)
      more = {wake_of(run)}
    elseif run.due <= NOW_MS and run.state == STATE.scheduled then
      more = enter(run)
    end
  end
  for _, wake in ipairs(more) do wakes[#wakes + 1] = wake end
end
local parked = redis.call('ZRANGEBYSCORE', k.timeouts(), '-inf', digits(NOW_MS), 'LIMIT', 0, limit - #ids)
for _, id in ipairs(parked) do
  local run = load(id)
  redis.call('ZREM', k.timeouts(), id)
  if run and PARKED[run.state] then wakes[#wakes + 1] = unpark(run, timed_out(id)) end
end
for _, wake in ipairs(go_on_stopping()) do wakes[#wakes + 1] = wake end
local has_more = redis.call('ZCARD', k.stopping()) > 0
return reply{wakes = wakes, examined = has_more and limit or #ids + #parked, overdue = overdue}
