--#include time
-- Reading what may not be what it should be: one record that is broken must stop nobody else.

-- needs(key, kind): the script ends here, with an error that names the key, unless it has this type or is not there
local function needs(key, kind)
  local found = redis.call('TYPE', key).ok
  if found ~= kind and found ~= 'none' then aside().fail(key) end
end

-- decoded(text): what the JSON holds; nil for what is not a JSON object or list
local function decoded(text)
  local ok, value = pcall(cjson.decode, text)
  return ok and type(value) == 'table' and value or nil
end

local function whole(text)
  local number = tonumber(text) or 0
  return number > -2 ^ 53 and number < 2 ^ 53 and number or 0
end

-- field_of(R, name): a field of a run's record, nil also where the key is not a record
local function field_of(R, name)
  local value = redis.pcall('HGET', k.run(R), name)
  return type(value) == 'string' and value or nil
end

-- is_known(R): whether there is a record of this run
local function is_known(R) return field_of(R, 'state') ~= nil end

-- journal_length(R): how many records it has; 0 also where the key is not a journal: `claim` ends such a run
local function journal_length(R)
  local length = redis.pcall('LLEN', k.journal(R))
  return type(length) == 'number' and length or 0
end

-- count_up(key, field, by): so many more, one by default; what is not a number there begins anew
local function count_up(key, field, by)
  local counted = redis.pcall('HINCRBY', key, field, by or 1)
  if type(counted) == 'number' then return counted end
  if not is_wrong_type(counted) then redis.call('HDEL', key, field) end
  return redis.call('HINCRBY', key, field, by or 1)
end
