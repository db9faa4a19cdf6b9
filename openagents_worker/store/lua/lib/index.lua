--#include time
-- Lists of runs and of sessions, for who looks for them. Written in the script that makes what they list.
local SESSIONS = 'sessions' -- the list of sessions; all others list runs

local function list_in(name, id)
  redis.call('ZADD', k.index(name), digits(NOW_MS), id)
  redis.call('ZADD', k.indexes(), 'NX', digits(NOW_MS + (name == SESSIONS and SESSION_TTL_MS or RUN_TTL_MS)), name)
end

-- lists_of(run, more): the lists that a run is in; `more` are those of its tenant and labels
local function lists_of(run, more)
  return {'all', 'agent=' .. run.agent, 'session=' .. run.session, unpack(more)}
end
