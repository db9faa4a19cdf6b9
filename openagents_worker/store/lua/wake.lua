-- Wakes what is due: retries become queued, delayed runs take their place. At most `limit` a call. Returns wakes, seen
--#include session
local wakes = {}
local ids = redis.call('ZRANGEBYSCORE', k.due(), '-inf', digits(NOW_MS), 'LIMIT', 0, limit)
for _, id in ipairs(ids) do
  local run = load(id)
  local wake = nil
  if run and run.owner == '' and run.due <= NOW_MS then
    if run.state == 'retrying' then
      redis.call('HSET', k.run(id), 'state', 'queued')
      wake = wake_of(run)
    elseif run.state == 'scheduled' then
      wake = place(run)
    end
  end
  redis.call('ZREM', k.due(), id)
  if wake then wakes[#wakes + 1] = wake end
end
return {wakes, #ids}
