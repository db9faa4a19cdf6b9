-- Finds the messages that are not needed any more (`messages`: queue, run, send time in µs, 'ended' or '', queue …). A message that only
-- notifies Celery of an end ('ended') is not needed if Celery was notified, or if the run was resumed. Any other message is not needed if a later
-- one was sent for the run, or if the run is over and Celery was notified. (`sent_again` sets the send time of a repeated notification to a time
-- in the future.) Changes nothing. Returns their positions, from 0
--#include time
local found = {}
for i = 1, #messages, 4 do
  local queue, id, sent_us, kind = unpack(messages, i, i + 3)
  local last = kind == '' and redis.call('ZSCORE', k.sent(queue), id)
  local gone
  if last then
    gone = tonumber(last) > tonumber(sent_us)
  else
    local state, notify_pending = unpack(redis.call('HMGET', k.run(id), 'state', 'untold'))
    if kind == 'ended' then gone = not (TERMINAL[state] and notify_pending) else gone = TERMINAL[state] and not notify_pending end
  end
  if gone then found[#found + 1] = (i - 1) / 4 end
end
return found
