-- Celery was told how a run ended: its state, its callbacks. Only of the life that was told. Returns OK | LATER (it has moved on)
--#include run
local run = load(run_id)
if not run or run.life ~= life or not TERMINAL[run.state] then return 'LATER' end
redis.call('HDEL', k.run(run_id), 'untold', 'tellings')
redis.call('ZREM', k.sent(run.queue), run_id)
return 'OK'
