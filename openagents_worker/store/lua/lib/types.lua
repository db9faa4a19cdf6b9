-- Handles a key whose type differs from the key table: it cannot contain data of this library. If the script can continue without it, the key is
-- renamed, and the command is repeated as if the key did not exist. Otherwise the script ends with an error that names the key. Scripts check such
-- keys before their first write (`needs`), so that no write is partial. If all types are correct, this costs almost nothing.
local given, tried = redis.call, redis.pcall

local function is_wrong_type(answer) return type(answer) == 'table' and answer.err and string.find(answer.err, 'WRONGTYPE', 1, true) end

-- aside(): functions for such keys. Redis creates all functions in every call of a script, so these are created only when they are needed
local function aside()
  local MOST_NOTED = 1000
  local A = {}
  local t = given('TIME')
  local at_us = string.format('%.0f', t[1] * 1000000 + t[2])

  function A.type_of(key) return given('TYPE', key).ok end

  local function rename(key)
    local name = k.aside_key(string.sub(key, #P + 2) .. '@' .. at_us)
    given('RENAME', key, name)
    given('PEXPIRE', name, RUN_TTL_MS)
    return name
  end

  -- note(key, code, what, more): adds an entry to the list of dead letters, for operators; `more` is JSON that begins with a comma
  function A.note(key, code, what, more)
    local said = ',"key":' .. cjson.encode(key) .. ',"code":"' .. code .. '","what":' .. cjson.encode(what) .. (more or '') .. '}'
    local newest = tried('LINDEX', k.aside(), 0)
    if is_wrong_type(newest) then
      rename(k.aside())
    elseif newest and string.sub(newest, -#said) == said then
      return -- the newest entry is the same
    end
    given('LPUSH', k.aside(), '{"at_us":' .. at_us .. said)
    given('LTRIM', k.aside(), 0, MOST_NOTED - 1)
    given('PEXPIRE', k.aside(), RUN_TTL_MS)
  end

  -- move(key): renames the key, and adds an entry to the list of dead letters
  function A.move(key)
    local found = A.type_of(key)
    local name = rename(key)
    A.note(key, 'redis.wrong_type', 'the key was a ' .. found .. ', which is a wrong type, and was renamed',
      ',"moved_to":' .. cjson.encode(name))
  end

  function A.is_left_in_place(key)
    local name = string.sub(key, #P + 2)
    for _, pattern in ipairs(LEFT_IN_PLACE_PATTERNS) do if string.find(name, pattern) then return true end end
    return false
  end

  function A.fail(key) error('OA_WRONG_TYPE ' .. key .. ' ' .. A.type_of(key) .. ' ') end
  return A
end

local redis = {pcall = redis.pcall, error_reply = redis.error_reply, acl_check_cmd = redis.acl_check_cmd, sha1hex = redis.sha1hex}
function redis.call(...)
  local answer = tried(...)
  if type(answer) ~= 'table' or not answer.err then return answer end
  if is_wrong_type(answer) then
    local _, key = ...
    local A = aside()
    if A.is_left_in_place(key) then A.fail(key) end
    if A.type_of(key) ~= 'none' then A.move(key) end
  end
  return given(...) -- raises the error of Redis, or succeeds now
end
