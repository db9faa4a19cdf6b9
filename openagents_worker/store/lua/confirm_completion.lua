-- Stores that Celery was notified of the end of runs, so it has their states and has run their callbacks (`runs`: id, life, id, life …).
-- Returns for each 1, or 0 if the run is in another life
--#include run
local answers = {}
for i = 1, #runs, 2 do
  local run = load(runs[i])
  if run and run.life == tonumber(runs[i + 1]) and TERMINAL[run.state] then
    redis.call('HDEL', k.run(run.id), 'untold', 'tellings')
    redis.call('ZREM', k.sent(run.queue), run.id)
    answers[#answers + 1] = 1
  else
    answers[#answers + 1] = 0
  end
end
return answers
