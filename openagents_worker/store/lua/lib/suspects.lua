--#include run
--#include records
-- Which run may have killed a process. A death makes suspects of the runs that the process carried without a new record since their
-- claim: half of them become one group, half another; those that were a group already are halved again, apart from the others.
-- A process carries suspects of one group only, beside any number of other runs: so each death halves the group that holds the run
-- that kills, and only a run that died as the one suspect of its process is counted (`stuck`), and poisoned when it was too often.
-- A record ends all suspicion. A lease that was lost without a death (its process answers again; others were lost within a heartbeat;
-- the watchdog named another run) adds none, at most three times in a row without a record.
local SUSPECTS_KEPT_MS = 86400000 -- a worker of the previous version that reclaims does not know of the set

-- sound(held): a suspicion with each of its fields, whatever stands in the record
local function sound(held)
  if type(held) ~= 'table' then held = {} end
  local function text(name) return type(held[name]) == 'string' and held[name] or '' end
  return {group = text('group'), by = text('by'), at = text('at'), halved = whole(held.halved), spared = whole(held.spared),
    named = whole(held.named)}
end

-- suspicion_of(run): group ('': none), halved (deaths in the company of others), spared (in a row), named (by the watchdog), by (whose
-- death it is from). A worker of the previous version leaves runs that died twice without it: such a one is a group of its own.
local function suspicion_of(run)
  if run.suspicion == '' and run.stuck < 2 then return {group = '', halved = 0, spared = 0, named = 0, by = ''} end
  local at = digits(run.life) .. ':' .. digits(journal_length(run.id))
  local held = run.suspicion ~= '' and sound(decoded(run.suspicion)) or {}
  if held.at == at then return held end
  return {group = run.stuck >= 2 and run.id or '', halved = 0, spared = 0, named = 0, by = ''}
end

-- group_in(I): the group of the suspects that the worker carries, '' for none
local function group_in(incarnation)
  while true do
    local id = redis.call('SRANDMEMBER', k.suspects(incarnation))
    if not id then return '' end
    local run = load(id)
    local group = run and run.owner == incarnation and suspicion_of(run).group or ''
    if group ~= '' then return group end
    redis.call('SREM', k.suspects(incarnation), id) -- taken away by a worker of the previous version
  end
end
