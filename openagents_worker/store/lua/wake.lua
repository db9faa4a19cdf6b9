-- Wakes runs that are due: retries become queued, delayed runs enter their sessions, and a run that was not started before it expired ends.
-- At most `limit` runs in a call. Returns `Woken`
--#include end_run
local wakes = {}
local ids = redis.call('ZRANGEBYSCORE', k.due(), '-inf', digits(NOW_MS), 'LIMIT', 0, limit)
for _, id in ipairs(ids) do
  local run = load(id)
  local more = {}
  redis.call('ZREM', k.due(), id)
  if run and run.owner == '' and not TERMINAL[run.state] then
    if expired(run) then
      more = cancelled(run, 'expired')
    elseif run.due <= NOW_MS and run.state == STATE.retrying then
      redis.call('HSET', k.run(id), 'state', STATE.queued)
      look_in_time(run)
      more = {wake_of(run)}
    elseif run.due <= NOW_MS and run.state == STATE.scheduled then
      more = {place(run)}
    end
  end
  for _, wake in ipairs(more) do wakes[#wakes + 1] = wake end
end
return reply{wakes = wakes, examined = #ids}
