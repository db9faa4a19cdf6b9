-- Which messages nobody waits for any more (`messages`: queue, run, µs of its sending, 'ended' or '', queue …). One that only notifies
-- Celery of an end ('ended'): Celery knows it, or the run goes on. Any other: a later one was sent for the run, or it is over and Celery
-- knows it. (The send time of a notification that was sent again lies ahead of its message: sent_again.) Changes nothing.
-- Returns their positions, from 1
--#include time
local found = {}
for i = 1, #messages, 4 do
  local queue, id, sent_us, kind = unpack(messages, i, i + 3)
  local last = kind == '' and redis.call('ZSCORE', k.sent(queue), id)
  local gone
  if last then
    gone = tonumber(last) > tonumber(sent_us)
  else
    local state, untold = unpack(redis.call('HMGET', k.run(id), 'state', 'untold'))
    if kind == 'ended' then gone = not (TERMINAL[state] and untold) else gone = TERMINAL[state] and not untold end
  end
  if gone then found[#found + 1] = (i + 3) / 4 end
end
return found
