-- Publishes a piece of a reply to whoever watches; nothing is stored. Returns OK | FENCED
--#include run
local run = live(run_id, fence)
if not run then return 'FENCED' end
redis.call('PUBLISH', k.channel(run.agent, run.session, run_id), envelope(run, 'llm.delta', 'null', payload))
return 'OK'
