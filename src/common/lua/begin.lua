#!lua flags=allow-oom
-- in flight: the last step before a handler starts.
-- KEYS 1 stream 2 index 3 starts 4 tries 5 dlq 6 open 7.. processed sets
-- ARGV 1 group 2 consumer 3 suspicion at which a mail is poison 4 solo: 1 if the mail runs alone in a process of its own
--      5 time (ISO), then n x {stream id, delivery count, email_id, member, number of its set from 1, field in open}
-- -> n x {GO | SUSPECT | DUP | LOST | POISON, failed attempts so far}
-- A start is a mark in `starts`; complete, fail and release take it away. A mark of an earlier delivery means that the start never
-- finished: the mail is a suspect and begins only alone. Its suspicion grows by 1 with each solo start that never finishes (the worker
-- died meanwhile, perhaps of something else) and by 3 more when its own process died of it (`fail`, crash).
--#include fence
--#include bury
--#include stands
local STEP, mails, ids = 6, {}, {}
for i = 6, #ARGV, STEP do
  local mail = {sid = ARGV[i], count = ARGV[i + 1], id = ARGV[i + 2], member = ARGV[i + 3], set = tonumber(ARGV[i + 4]), open = ARGV[i + 5]}
  mails[#mails + 1] = mail
  ids[#ids + 1] = mail.sid
end
local owned = held(KEYS[1], ARGV[1], ARGV[2], ids)
local email_ids, of_set, answer = {}, {}, {}
for i, mail in ipairs(mails) do
  email_ids[i] = mail.id
  of_set[mail.set] = of_set[mail.set] or {members = {}, mails = {}}
  table.insert(of_set[mail.set].members, mail.member)
  table.insert(of_set[mail.set].mails, mail)
end
local located = redis.call('HMGET', KEYS[2], unpack(email_ids))
local starts = redis.call('HMGET', KEYS[3], unpack(email_ids))
local tries = redis.call('EXISTS', KEYS[4]) == 1 and redis.call('HMGET', KEYS[4], unpack(email_ids)) or {}  -- mostly nobody failed
for set, part in pairs(of_set) do
  local done = redis.call('SMISMEMBER', KEYS[6 + set], unpack(part.members))
  for i = 1, #done do part.mails[i].done = done[i] == 1 end
end

local adopted, drop, marks = {}, {}, {}
for i, mail in ipairs(mails) do
  local here, location = 'S:' .. mail.sid, adopted[mail.id] or located[i]
  local attempts = string.match(tries[i] or '0|', '^(%d+)|')
  local verdict
  if owned[mail.sid] ~= mail.count then
    verdict = 'LOST'
  elseif mail.done or (location and location ~= here and stands(KEYS[1], KEYS[5], location)) then
    verdict = 'DUP'                               -- done already, or another copy is the live one
    drop[#drop + 1] = mail.sid
    if location == here then
      redis.call('HDEL', KEYS[2], mail.id)
      if redis.call('HINCRBY', KEYS[6], mail.open, -1) <= 0 then redis.call('HDEL', KEYS[6], mail.open) end
    end
  else
    if location ~= here then                      -- the only copy left: adopt it, never delete it
      redis.call('HSET', KEYS[2], mail.id, here)
      adopted[mail.id] = here
      if not location then redis.call('HINCRBY', KEYS[6], mail.open, 1) end
    end
    local tag = mail.sid .. ':' .. mail.count
    local solo, last = string.match(starts[i] or '', '^(%d+)|(.*)$')
    solo = tonumber(solo or '0')
    if last == nil or last == tag then            -- not started before, or this very call repeated
      verdict = 'GO'
      if last == nil then
        marks[#marks + 1] = mail.id
        marks[#marks + 1] = '0|' .. tag
      end
    elseif solo >= tonumber(ARGV[3]) then
      verdict = 'POISON'
      local dead = bury(KEYS[1], KEYS[5], mail.sid, {'dead_reason', 'poison', 'dead_error_type', 'Poison',
        'dead_error', 'started alone, again and again, in a process of its own that did not live to its end', 'dead_attempts', attempts, 'dead_at', ARGV[5], 'dead_worker', ARGV[2]}, tries[i])
      if dead then redis.call('HSET', KEYS[2], mail.id, 'D:' .. dead) end
      redis.call('HDEL', KEYS[3], mail.id)
      redis.call('HDEL', KEYS[4], mail.id)
      drop[#drop + 1] = mail.sid
    elseif ARGV[4] == '1' then
      verdict = 'GO'
      marks[#marks + 1] = mail.id
      marks[#marks + 1] = (solo + 1) .. '|' .. tag
    else
      verdict = 'SUSPECT'
    end
  end
  answer[i] = {verdict, attempts}
end
if #marks > 0 then redis.call('HSET', KEYS[3], unpack(marks)) end
if #drop > 0 then
  redis.call('XACK', KEYS[1], ARGV[1], unpack(drop))
  redis.call('XDEL', KEYS[1], unpack(drop))
end
return answer
