-- Copies a session: its transcript, artifacts and state. The runs of the session are not copied. Returns OK | EXISTS (the new session) | UNKNOWN
--#include session_copy
if not session_exists(session_id) then return 'UNKNOWN' end
if session_exists(new_session_id) then return 'EXISTS' end
needs(k.transcript(session_id), 'list')
needs(k.artifacts(session_id), 'list')
needs(k.session_state(session_id), 'hash')
copy_session(session_id, new_session_id, redis.call('LLEN', k.transcript(session_id)), redis.call('LLEN', k.artifacts(session_id)))
list_in(SESSIONS, new_session_id)
for _, key in ipairs(session_keys(new_session_id)) do redis.call('PEXPIRE', key, SESSION_TTL_MS) end
return 'OK'
