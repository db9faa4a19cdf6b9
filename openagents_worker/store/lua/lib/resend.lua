--#include run
--#include records
-- sent_again(queue, id, grace_ms): the wake-up of the run with a new send time. If the run needs none, its entry is removed: nil.
-- For a run that has ended, a message is sent in increasing intervals until Celery was notified, because each notification may fail.
local function sent_again(queue, id, grace_ms)
  local run = load(id)
  if run and run.state == STATE.queued and run.owner == '' then
    count_up(k.sent_again(), queue)
    return wake_of(run)
  end
  if run and TERMINAL[run.state] and redis.call('HEXISTS', k.run(id), 'untold') == 1 then
    local wake = wake_of(run)
    wake.is_ended = true
    local notices = redis.call('HINCRBY', k.run(id), 'tellings', 1)
    local pause_ms = math.min(grace_ms * (2 ^ math.min(notices, 20) - 2), 600000)
    redis.call('ZINCRBY', k.sent(queue), digits(pause_ms * 1000), id)
    return wake
  end
  redis.call('ZREM', k.sent(queue), id)
  return nil
end
