-- Wakes what is due: retries become queued, delayed runs take their place, a run that was to be started by now ends.
-- At most `limit` a call. Returns wakes, seen
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
return {wakes, #ids}
