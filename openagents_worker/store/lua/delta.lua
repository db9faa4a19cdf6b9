-- Publishes a piece of a reply to whoever watches, and keeps the reply so far for who joins: it is no event and in no stream.
-- payload = {call, offset, text, …}; offset = characters before the piece. Returns OK | FENCED
--#include run
local run = live(run_id, fence)
if not run then return 'FENCED' end
append(run, {'llm.delta', payload})
return 'OK'
